"""The pair that ships, and how it is trained."""
