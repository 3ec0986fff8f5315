"""The public doors: OpenAI's HTTP shapes and the gRPC service. Start at `http.create_app`."""
