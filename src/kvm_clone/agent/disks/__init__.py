"""What holds a disk's content: image files by format, NBD servers, and the locks and filesystems below them."""
