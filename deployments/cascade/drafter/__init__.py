"""The drafter tier: drafts blocks of tokens."""
