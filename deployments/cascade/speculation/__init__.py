"""Drafting, verification and deferral rules as pure functions, and how long a draft should be."""
