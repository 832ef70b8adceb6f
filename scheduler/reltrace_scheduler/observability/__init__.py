"""What Prometheus reads of a scheduler; README.md lists the names."""
