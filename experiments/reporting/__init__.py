"""Reports on runs: what the commands `report` and `compare` show, and how a panel is drawn."""
