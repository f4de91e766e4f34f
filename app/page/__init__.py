"""The page: theme, tabs, and the style picker. Tabs call the studio; nothing here draws."""
