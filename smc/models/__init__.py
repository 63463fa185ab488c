"""Small value types shared by the whole library."""
