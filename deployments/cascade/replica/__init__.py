"""What a running cluster needs: leases, metrics, failover."""
