-- The demo's shop. Nothing here knows pgworker but the trigger at the end.

create schema pgworker_demo;
comment on schema pgworker_demo is 'pgworker demo: dropped and made anew by every run';

create table pgworker_demo.customers (
  id    int  primary key,
  name  text not null,
  email text not null
);

create table pgworker_demo.orders (
  id          int         primary key,
  customer_id int         not null references pgworker_demo.customers,
  paid_by     text        not null check (paid_by in ('invoice', 'card')),
  ordered_at  timestamptz not null
);

create table pgworker_demo.order_items (
  order_id    int  not null references pgworker_demo.orders,
  line        int  not null,
  article     text not null,
  quantity    int  not null,
  price_cents int  not null,
  primary key (order_id, line)
);

-- Each new order queues its jobs in the transaction that inserts it: they are claimed once that has committed, and
-- vanish with it if it rolls back.
create function pgworker_demo.order_placed() returns trigger
language plpgsql
as $$
begin
  perform pgworker.add_job('prepare_receipt', jsonb_build_object('order', new.id), flags := '{pgworker_demo}');
  if new.paid_by = 'card' then
    perform pgworker.add_job('charge_card', jsonb_build_object('order', new.id), flags := '{pgworker_demo}');
  end if;
  return null;
end
$$;

create trigger order_placed after insert on pgworker_demo.orders
for each row execute function pgworker_demo.order_placed();
