"""From trained translators to a scored slice or scan: finding and loading them, scoring, a scan's way in and out."""
