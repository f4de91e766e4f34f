"""The tabs of the studio, a class each: ``lay_out()`` builds it inside its ``gr.Tab``."""
