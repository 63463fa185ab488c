"""What is paid, one file each."""
