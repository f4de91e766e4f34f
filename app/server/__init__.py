"""The web server around the page: address, access, visitors, files served, error messages."""
