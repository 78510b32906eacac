"""The throughput model, the grid search, the router and the controllers: pure, without clock or I/O."""
