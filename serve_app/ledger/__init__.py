"""What must survive a restart: keys today; usage, prices and budgets beside them."""
