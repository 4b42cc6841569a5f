"""Tables, pictures and pages made from committed rows."""
