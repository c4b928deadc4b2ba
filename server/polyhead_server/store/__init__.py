"""Which adapters there are and where their weights lie: folder, host cache, device pool. Knows no request."""
