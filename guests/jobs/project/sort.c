#include "parts.h"
#include <stdlib.h>
#include <string.h>

struct item {
	struct item *next;
	uint32_t key;
	char name[12];
};

static int by_key(const void *a, const void *b)
{
	uint32_t one = ((const struct item *)a)->key, two = ((const struct item *)b)->key;
	return (one > two) - (one < two);
}

static struct item *merge(struct item *a, struct item *b)
{
	struct item *head = NULL, **end = &head;

	while (a && b) {
		struct item **least = a->key <= b->key ? &a : &b;
		*end = *least;
		end = &(*end)->next;
		*least = (*least)->next;
	}
	*end = a ? a : b;
	return head;
}

static struct item *sort_list(struct item *list)
{
	struct item *middle = list, *half;

	if (!list || !list->next)
		return list;
	for (struct item *end = list->next; end && end->next; end = end->next->next)
		middle = middle->next;
	half = middle->next;
	middle->next = NULL;
	return merge(sort_list(list), sort_list(half));
}

/* The library's sort of an array and ours of a list must agree. */
int sorts_well(size_t count)
{
	struct item *array = calloc(count, sizeof *array), *list = NULL;
	uint32_t random = 42;
	int well = 1;

	if (!array)
		abort();
	for (size_t i = 0; i < count; i++) {
		struct item *item = malloc(sizeof *item);
		if (!item)
			abort();
		item->key = next_random(&random);
		memset(item->name, (int)('a' + i % 26), sizeof item->name);
		item->next = list;
		list = item;
		array[i] = *item;
	}
	qsort(array, count, sizeof *array, by_key);
	list = sort_list(list);
	for (size_t i = 0; i < count; i++) {
		struct item *next = list ? list->next : NULL;
		if (!list || list->key != array[i].key || list->name[0] != array[i].name[11])
			well = 0;
		free(list);
		list = next;
	}
	free(array);
	return well && !list;
}
