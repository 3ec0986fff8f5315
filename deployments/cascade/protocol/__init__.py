"""Values between processes: codec, streams and status."""
