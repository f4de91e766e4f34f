"""The app: mix styles on a resident pipeline, in the browser or through an API."""
