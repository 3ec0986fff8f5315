"""The drafter tier: drafts blocks of tokens, on request and ahead of the verdicts."""
