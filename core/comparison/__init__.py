"""`compare`: what differs between runs, in settings and in outcome."""
