"""Real dispatchers on an emulated cluster: ranks in network namespaces, joined by links that are as slow as wanted."""
