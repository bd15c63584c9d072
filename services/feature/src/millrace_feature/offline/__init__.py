"""Historical features over gRPC."""
