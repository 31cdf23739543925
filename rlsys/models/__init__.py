"""The policy, the encoders, and what runs them."""
