"""The gRPC protocol between router and replicas: messages, codec, client and server."""
