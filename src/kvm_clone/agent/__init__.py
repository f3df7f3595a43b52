"""The agent: what runs on the hosts.

It is sent over ssh and run from memory, so it uses the standard library alone, runs on Python 3.9 and newer, and
imports nothing of the controller. The controller may import it; a test keeps both rules.
"""
