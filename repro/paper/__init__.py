"""What the paper prints, as data: tables, numbers of the text, and the claims that this kit tests."""
