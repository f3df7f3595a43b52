"""A plan is carried out: the run, its backup job, the merge after a commit, and what is tried or measured ahead."""
