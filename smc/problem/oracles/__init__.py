"""References that share no code with what is tested against them."""
