"""The public APIs: OpenAI's HTTP routes and the gRPC service. Start at `http.create_app`."""
