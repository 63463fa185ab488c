"""What is priced: contracts, the domain they are drawn from, and the references that answers are compared with."""
