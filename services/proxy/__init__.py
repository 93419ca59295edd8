"""The data plane: OpenAI-compatible HTTP in front of the fleet's replicas."""
