// A batch of queries of one screen, whole: lastlayer/kernels/screening.py packs both structures.
#include "screening.h"

#include "engine.h"

LASTLAYER_KERNEL(screen)(const void* screen_address, const void* query_address) {
    using namespace lastlayer;
    const Screen& screen = *static_cast<const Screen*>(screen_address);
    const Query& query = *static_cast<const Query*>(query_address);
    const auto size = static_cast<size_t>(query.count * num_blocks(screen));
    Summaries summaries{std::vector<float>(size), std::vector<float>(size)};
    const Prepared prepared = prepare_hidden(screen, query);
    scan(screen, query, prepared, summaries);
    if (!query.only_scores) select(screen, query, prepared, summaries);
    return 0;
}
