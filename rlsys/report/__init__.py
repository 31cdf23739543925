"""What a person looks at after a run: its directory, its summary."""
