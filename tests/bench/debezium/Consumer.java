import io.debezium.embedded.Connect;
import io.debezium.engine.DebeziumEngine;
import io.debezium.engine.RecordChangeEvent;
import io.debezium.engine.format.ChangeEventFormat;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Properties;
import org.apache.kafka.connect.data.Field;
import org.apache.kafka.connect.data.Struct;
import org.apache.kafka.connect.source.SourceRecord;
import redis.clients.jedis.Jedis;
import redis.clients.jedis.Pipeline;

/**
 * Debezium into Redis: the engine with its Postgres connector (pgoutput), and a consumer that pipelines HSET with jedis.
 *
 * <p>Consumer HOST DATABASE REDIS_PORT SLOT [POLL_INTERVAL_MS]; the password of the user postgres is in PGPASSWORD.
 *
 * <p>What is done in Debezium's favour: events are taken as Connect records, so nothing is made into JSON and parsed again;
 * a batch of the engine is one pipeline without MULTI; only the last record of a batch is marked as processed; offsets stay in
 * memory; and the process ends at once when the end mark was seen, without stopping the engine in good order. All settings that
 * are not named here are the defaults (batches of 2048, a queue of 8192).
 *
 * <p>Debezium gives numeric as a string when asked to, and timestamptz as ISO 8601 with all six digits. Redis must hold what
 * Postgres prints, so the consumer puts a blank for T, +00 for Z (the benchmark's time zone is UTC), and leaves zeros at the end of
 * the fraction out; that is the only mapping it makes, and it is good for this benchmark's columns (bigint, int, text, numeric,
 * bool, timestamptz) and not for every type.
 *
 * <p>It ends at a logical message with the prefix bench, which the benchmark writes behind a load.
 */
public final class Consumer {
    private static final String TIMESTAMPTZ = "io.debezium.time.ZonedTimestamp";

    private final Jedis redis;

    private Consumer(int port) {
        redis = new Jedis("127.0.0.1", port);
    }

    public static void main(String[] arguments) throws Exception {
        Consumer consumer = new Consumer(Integer.parseInt(arguments[2]));
        Properties settings = new Properties();
        settings.setProperty("name", "bench");
        settings.setProperty("topic.prefix", "bench");
        settings.setProperty("connector.class", "io.debezium.connector.postgresql.PostgresConnector");
        settings.setProperty("offset.storage", "org.apache.kafka.connect.storage.MemoryOffsetBackingStore");
        settings.setProperty("database.hostname", arguments[0]);
        settings.setProperty("database.port", "5432");
        settings.setProperty("database.user", "postgres");
        settings.setProperty("database.password", System.getenv("PGPASSWORD"));
        settings.setProperty("database.dbname", arguments[1]);
        settings.setProperty("plugin.name", "pgoutput");
        settings.setProperty("slot.name", arguments[3]);
        settings.setProperty("publication.name", "bench");
        settings.setProperty("publication.autocreate.mode", "disabled");
        settings.setProperty("schema.include.list", "public");
        // The load is in the WAL behind the slot; a snapshot would read it from the table.
        settings.setProperty("snapshot.mode", "no_data");
        settings.setProperty("decimal.handling.mode", "string");
        settings.setProperty("tombstones.on.delete", "false");
        if (arguments.length > 4) {
            settings.setProperty("poll.interval.ms", arguments[4]);
        }
        DebeziumEngine<RecordChangeEvent<SourceRecord>> engine =
                DebeziumEngine.create(ChangeEventFormat.of(Connect.class))
                        .using(settings)
                        .using((success, message, error) -> {
                            System.err.println("the engine ended: " + message);
                            if (error != null) {
                                error.printStackTrace();
                            }
                            Runtime.getRuntime().halt(1);
                        })
                        .notifying(consumer::apply)
                        .build();
        engine.run();
    }

    private void apply(
            List<RecordChangeEvent<SourceRecord>> events,
            DebeziumEngine.RecordCommitter<RecordChangeEvent<SourceRecord>> committer)
            throws InterruptedException {
        boolean end = false;
        try (Pipeline pipeline = redis.pipelined()) {
            for (RecordChangeEvent<SourceRecord> event : events) {
                end |= queue(event.record(), pipeline);
            }
        } catch (RuntimeException error) {
            error.printStackTrace();
            Runtime.getRuntime().halt(1);
        }
        if (end) {
            Runtime.getRuntime().halt(0);
        }
        committer.markProcessed(events.get(events.size() - 1));
        committer.markBatchFinished();
    }

    /** Queues the command for a change; true for the end mark. */
    private static boolean queue(SourceRecord record, Pipeline pipeline) {
        Struct value = (Struct) record.value();
        String operation = value.getString("op");
        if (operation.equals("m")) {
            return value.getStruct("message").getString("prefix").equals("bench");
        }
        Struct key = (Struct) record.key();
        String name = value.getStruct("source").getString("table") + ":" + key.get(key.schema().fields().get(0));
        if (operation.equals("d")) {
            pipeline.del(name);
            return false;
        }
        Struct row = value.getStruct("after");
        Map<String, String> fields = new LinkedHashMap<>();
        for (Field field : row.schema().fields()) {
            Object column = row.get(field);
            if (column != null) {
                String text = column.toString();
                fields.put(field.name(), TIMESTAMPTZ.equals(field.schema().name()) ? timestamp(text) : text);
            }
        }
        pipeline.hset(name, fields);
        return false;
    }

    /** 2026-01-01T00:00:01.500000Z as 2026-01-01 00:00:01.5+00. */
    private static String timestamp(String iso) {
        int end = iso.length() - 1;
        if (iso.indexOf('.') > 0) {
            while (iso.charAt(end - 1) == '0') {
                end--;
            }
            if (iso.charAt(end - 1) == '.') {
                end--;
            }
        }
        return iso.substring(0, 10) + ' ' + iso.substring(11, end) + "+00";
    }
}
