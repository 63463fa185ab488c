"""What people read: commands, pages, pictures and TensorBoard's files."""
