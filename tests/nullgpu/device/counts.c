// What happened on the device: a table that ctypes reads, and a trace with one line per event (NULLCUDA_TRACE=FILE).
#include "null.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { ROOM = 1 << 14 };  // a power of two

typedef struct {
  char *kind, *name;
  long events;
  double amount;
} Row;

static Row table[ROOM];
static int order[ROOM];  // where the rows are, in the order of their first event
static int rows;
static FILE *trace;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

long setting(const char *variable, long otherwise) {
  const char *value = getenv(variable);
  return value && *value ? atol(value) : otherwise;
}

static Row *row_of(const char *kind, const char *name) {
  unsigned hash = 2166136261u;
  for (const char *c = name; *c; c++) hash = (hash ^ (unsigned char)*c) * 16777619u;
  for (unsigned at = hash;; at++) {
    Row *row = &table[at % ROOM];
    if (!row->kind) {
      if (rows == ROOM - 1) {
        fprintf(stderr, "null device: more than %d names of events\n", rows);
        abort();
      }
      row->kind = strdup(kind);
      row->name = strdup(name);
      order[rows++] = at % ROOM;
      return row;
    }
    if (!strcmp(row->name, name) && !strcmp(row->kind, kind)) return row;
  }
}

static void add(const char *kind, const char *name, double amount, const char *detail) {
  pthread_mutex_lock(&lock);
  Row *row = row_of(kind, name);
  row->events++;
  row->amount += amount;
  if (trace) fprintf(trace, "%s\t%s\t%.0f\t%s\n", kind, name, amount, detail);
  pthread_mutex_unlock(&lock);
}

void count(const char *kind, const char *name, double amount) { add(kind, name, amount, ""); }

void count_with(const char *kind, const char *name, double amount, const char *format, ...) {
  char detail[512] = "";
  if (trace) {
    va_list values;
    va_start(values, format);
    vsnprintf(detail, sizeof detail, format, values);
    va_end(values);
  }
  add(kind, name, amount, detail);
}

// ---- read by tests/nullgpu/null_device.py ----

API int null_rows(void) { return rows; }

API int null_row(int index, const char **kind, const char **name, long *events, double *amount) {
  if (index < 0 || index >= rows) return 0;
  Row *row = &table[order[index]];
  *kind = row->kind;
  *name = row->name;
  *events = row->events;
  *amount = row->amount;
  return 1;
}

API void null_trace(const char *path) {
  pthread_mutex_lock(&lock);
  if (trace) fclose(trace);
  trace = path && *path ? fopen(path, "w") : NULL;
  pthread_mutex_unlock(&lock);
}

__attribute__((constructor)) static void begin(void) {
  // A library that is preloaded is loaded into every process: a name with %d gives each a file of its own.
  const char *path = getenv("NULLCUDA_TRACE");
  char own[4096];
  if (!path || !*path) return;
  const char *mark = strstr(path, "%d");
  if (mark) {
    snprintf(own, sizeof own, "%.*s%d%s", (int)(mark - path), path, (int)getpid(), mark + 2);
    path = own;
  }
  null_trace(path);
}
