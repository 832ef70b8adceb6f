"""The way to the servers: addresses, security, calls, submissions and their results."""
