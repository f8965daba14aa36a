"""Alembic's entry: runs the versions on the connection that `store.migrate` hands over, whose search path is our schema."""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    version_table="schema_version",
    version_table_schema="finetune",
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
