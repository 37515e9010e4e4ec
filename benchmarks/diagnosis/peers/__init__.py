"""What other tools say of the same runs: two packages as published, four rule sets from papers and documentation."""
