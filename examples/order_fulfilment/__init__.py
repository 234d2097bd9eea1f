"""The fulfilment of an order as a tree of jobs that is undone if it fails: a saga.

Goods are reserved, then the customer's account is charged, then a service is told to ship. Each step is a job that says
how it is undone (``compensate``): when a later one fails for good, or the order is cancelled, what was done is undone
one by one, the last step first.

    fulfil-order                 runs last: the order is on its way
    ├─ reserve                   undone by release
    ├─ charge                    after reserve; undone by refund
    └─ notify                    after charge; tells the service, which may be down

In the root of a checkout, with a database that has pgworker in it (``pgworker install``) named by DATABASE_URL:

    python -m examples.order_fulfilment --item lamp --quantity 2      opens a shop, adds the order, prints its id
    pgworker run examples.order_fulfilment.order --once               runs it: no service answers, so it is undone
    pgworker tree ID                                                  shows the steps, and what undid them

``--notify URL`` names a service that takes a POST with the order as JSON; without it nothing answers. ``--quantity 50``
is more than the customer can pay, ``--quantity 500`` more than there is.
"""
