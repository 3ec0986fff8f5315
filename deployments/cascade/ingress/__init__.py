"""The public doors: OpenAI over HTTP, and gRPC."""
