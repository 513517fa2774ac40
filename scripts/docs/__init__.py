"""What writes and checks the documentation."""
