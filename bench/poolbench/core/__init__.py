"""Cases, candidates, records: plain data that every part shares."""
