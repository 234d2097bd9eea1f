"""A monthly report as a tree of jobs.

Each category of a table of sales is summed up by a job of its own, and one more job asks a service for exchange rates.
When all of them have finished, a job renders an HTML page with a plot from their results. The service may well be down:
``on_failure="ignore"`` lets the report come without the rates.

    monthly-report                       runs last, and keeps where the page is and what is missing in it
    ├─ books, games, … (sum-up)          one for each category, side by side
    ├─ rates (exchange-rates)            may fail
    └─ page (render)                     after all of those

In the root of a checkout, with a database that has pgworker in it (``pgworker install``) named by DATABASE_URL:

    python -m examples.monthly_report 2026-09                   makes up the sales, adds the tree, prints its id
    pgworker run examples.monthly_report.report --once          runs it and writes monthly-report-2026-09.html
    pgworker tree ID                                            shows what became of it; with --follow while it runs

``--rates URL`` names a service that answers with a JSON object such as ``{"USD": 1.08}``; without it nothing answers.
"""
