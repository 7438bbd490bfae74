"""What the URLs of servers say, checked part by part before anything connects, and shown without their secrets."""
