"""What a trained network says of a contract, and how good that is."""
