"""A cluster that exists in numbers alone, with the router's own admission, ledgers and autoscaling."""
