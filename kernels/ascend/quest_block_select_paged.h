// Ascend kernels of quest_block_select_paged, two launches on one stream.
//
// The scored rows of all requests and KV heads lie in one row, cut into one share per core, so all
// cores have the same work whatever the lengths, and a long request spreads over many. A request's
// head that lies in one share is finished there. Of one that is cut, each core leaves its best k in
// the workspace, and the second kernel merges those. Where the cuts are does not matter to the
// result: a score depends on its row alone, and the best k of a total order on nothing else.
//
// A tile of rows is copied, maxima and minima, while the one before it is scored, and the first of
// a piece while the one before ends. Floors: the bytes of the metadata; see query_row.h for the
// vector repeats.

#ifndef SELECT_ATTN_OPS_ASCEND_QUEST_BLOCK_SELECT_PAGED_H_
#define SELECT_ATTN_OPS_ASCEND_QUEST_BLOCK_SELECT_PAGED_H_

#include <cstdint>

#include "ascend/arguments.h"
#include "ascend/clamped_ranges.h"
#include "ascend/core_share.h"
#include "ascend/global_memory.h"
#include "ascend/query_row.h"
#include "ascend/top_k.h"
#include "kernel_operator.h"

namespace select_attn::ascend {

// A part of the rows of one KV head of a request: its rows [first, end) of `num_rows`.
struct Piece {
  int64_t b;
  int64_t n;
  int64_t first;
  int64_t end;
  int64_t num_rows;

  __aicore__ inline bool is_whole() const { return first == 0 && end == num_rows; }
};

// The pieces of a core's share, in order. A request without scores has one row per KV head all the
// same, for the core that writes its result.
class PieceWalk {
 public:
  __aicore__ inline explicit PieceWalk(const QuestBlockSelectPagedArguments& arguments)
      : a_(arguments) {
    for (int64_t b = 0; b < a_.batch; ++b) total_ += RowsOf(b) * a_.num_kv_heads;
  }

  __aicore__ inline Share ShareOfCore(int64_t core) const {
    return ShareOf(core, a_.num_cores, total_);
  }

  __aicore__ inline void Begin(int64_t core) {
    share_ = ShareOfCore(core);
    position_ = share_.begin;
    first_of_request_ = 0;
    b_ = 0;
    rows_ = a_.batch > 0 ? RowsOf(0) : 0;
  }

  __aicore__ inline bool Next(Piece& piece) {
    if (position_ >= share_.end) return false;
    while (position_ >= first_of_request_ + rows_ * a_.num_kv_heads) {
      first_of_request_ += rows_ * a_.num_kv_heads;
      ++b_;
      rows_ = RowsOf(b_);
    }
    const int64_t inside = position_ - first_of_request_;
    const int64_t n = inside / rows_;
    const int64_t first = inside % rows_;
    const int64_t end = Smaller(rows_, first + share_.end - position_);
    piece = {b_, n, first, end, rows_};
    position_ += end - first;
    return true;
  }

  // Behind Next: where the piece's KV head ends in the row of all.
  __aicore__ inline int64_t EndOfHead(const Piece& piece) const {
    return position_ + piece.num_rows - piece.end;
  }

 private:
  __aicore__ inline int64_t RowsOf(int64_t b) const {
    return Larger(ClampedRanking(a_, b).num_scored, 1);
  }

  const QuestBlockSelectPagedArguments& a_;
  int64_t total_ = 0;
  Share share_ = {0, 0};
  int64_t position_ = 0;
  int64_t first_of_request_ = 0;
  int64_t b_ = 0;
  int64_t rows_ = 0;
};

// Where a core leaves the best of a piece. Of a cut head, the first piece is its core's last and
// the others are the first of theirs.
__aicore__ inline uint64_t PartialAddress(const QuestBlockSelectPagedArguments& a, int64_t core,
                                          bool is_first_of_head) {
  const int64_t list = core * kPartialLists + (is_first_of_head ? 1 : 0);
  return a.workspace + static_cast<uint64_t>(list * a.partial_list_bytes);
}

// Writes rows of the result.
class ResultWriter {
 public:
  __aicore__ inline ResultWriter() {}

  __aicore__ inline void Init(AscendC::TPipe* pipe) {
    pipe->InitBuffer(scores_buffer_, kMostK * sizeof(float));
    pipe->InitBuffer(blocks_buffer_, kMostK * sizeof(int32_t));
    pipe->InitBuffer(forced_buffer_, kMostK * sizeof(int32_t));
  }

  // Of KV head n of request b: the forced blocks, the best scored ones, -1 behind.
  __aicore__ inline void Write(const QuestBlockSelectPagedArguments& a, const Ranking& ranking,
                               int64_t b, int64_t n, TopK& top_k) {
    const AscendC::LocalTensor<int32_t> forced = forced_buffer_.Get<int32_t>();
    const AscendC::LocalTensor<int32_t> blocks = blocks_buffer_.Get<int32_t>();
    AscendC::PipeBarrier<PIPE_ALL>();
    const int64_t num_forced = Smaller(ranking.blocks.num_forced(), a.k);
    const int64_t num_slots = a.k - num_forced;
    const int64_t num_best = Smaller(top_k.num_best(), num_slots);
    if (num_best > 0) {
      AscendC::Extract(scores_buffer_.Get<float>(), blocks_buffer_.Get<uint32_t>(), top_k.best(),
                       static_cast<int32_t>((num_best + 31) / 32));
      AscendC::PipeBarrier<PIPE_ALL>();
    }
    for (int64_t i = 0; i < num_forced; ++i) {
      forced.SetValue(static_cast<uint32_t>(i), static_cast<int32_t>(ranking.blocks.Forced(i)));
    }
    for (int64_t i = num_best; i < num_slots; ++i) blocks.SetValue(static_cast<uint32_t>(i), -1);
    AscendC::PipeBarrier<PIPE_ALL>();
    const int64_t row = b * a.selected_request_stride + n * a.selected_head_stride;
    if (num_forced > 0) StoreRows({a.selected_indices, row, 0, 1, num_forced}, forced);
    if (num_slots > 0) StoreRows({a.selected_indices, row + num_forced, 0, 1, num_slots}, blocks);
    AscendC::PipeBarrier<PIPE_ALL>();
  }

 private:
  AscendC::TBuf<AscendC::TPosition::VECCALC> scores_buffer_;
  AscendC::TBuf<AscendC::TPosition::VECOUT> blocks_buffer_;
  AscendC::TBuf<AscendC::TPosition::VECOUT> forced_buffer_;
};

// First launch: scores. T is half, bfloat16_t or float.
template <typename T>
class QuestBlockSelectPagedKernel {
 public:
  __aicore__ inline QuestBlockSelectPagedKernel(const QuestBlockSelectPagedArguments& arguments,
                                                AscendC::TPipe* pipe)
      : a_(arguments), tile_rows_(QueryRow<T>::TileRows(arguments.head_dim)), walk_(arguments) {
    pipe->InitBuffer(heads_, 1, kHeadsBytes);
    pipe->InitBuffer(tiles_, kTilesInFlight, 2 * kTileElements * sizeof(T));
    query_.Init(pipe, a_.head_dim);
    top_k_.Init(pipe, static_cast<int32_t>(a_.k));
    writer_.Init(pipe);
    // Last, as it would put those behind it out of the alignment that sorting needs.
    pipe->InitBuffer(header_buffer_, kPartialHeaderBytes);
  }

  __aicore__ inline void Run() {
    const auto core = static_cast<int64_t>(AscendC::GetBlockIdx());
    walk_.Begin(core);
    BeginNext();
    while (has_next_) {
      Job job = next_;
      top_k_.Clear();
      if (job.ranking.num_scored > 0) {
        ScorePiece(job);
      } else {
        BeginNext();
      }
      if (job.piece.is_whole()) {
        writer_.Write(a_, job.ranking, job.piece.b, job.piece.n, top_k_);
      } else {
        StorePartial(PartialAddress(a_, core, job.piece.first == 0));
      }
    }
  }

 private:
  static constexpr int kTilesInFlight = 2;
  static constexpr int64_t kTileElements = QueryRow<T>::kTileElements;

  static constexpr int64_t kHeadsBytes = int64_t{4} * 1024;
  static constexpr int64_t kNotAskedFor = -1;

  using Tiles = AscendC::TQue<AscendC::TPosition::VECIN, kTilesInFlight>;

  // Gives a tile's buffer back.
  struct Release {
    Tiles& tiles;
    AscendC::LocalTensor<T>& tile;

    __aicore__ inline void operator()() const { tiles.FreeTensor(tile); }
  };

  // Rows of a piece that are not copied yet: KV blocks [j, end) of the request.
  struct Cursor {
    int64_t b;
    int64_t n;
    int64_t j;
    int64_t end;
    bool skipped;  // a row, because its table entry is bad
  };

  // A piece, and the rows of its first two tiles.
  struct Job {
    Piece piece;
    Ranking ranking;
    Cursor cursor;
    int64_t rows;
    int64_t next_rows;  // or kNotAskedFor
  };

  // Makes the core's next piece, if there is one, next_, and asks for its query and first tile.
  __aicore__ inline void BeginNext() {
    has_next_ = walk_.Next(next_.piece);
    if (!has_next_) return;
    const Piece& piece = next_.piece;
    next_.ranking = ClampedRanking(a_, piece.b);
    const int64_t first = next_.ranking.blocks.scored_begin;
    next_.cursor = {piece.b, piece.n, first + piece.first, first + piece.end, false};
    next_.rows = next_.next_rows = 0;
    if (next_.ranking.num_scored == 0) return;
    LoadHeads(piece, 0);
    next_.rows = LoadTile(next_.cursor, TopK::kChunk);
    if (next_.rows > 0) next_.next_rows = kNotAskedFor;
  }

  // Asks for the tile behind one of `rows` rows, of which the chunk has `in_chunk` before it.
  __aicore__ inline int64_t LoadTileBehind(Cursor& cursor, int64_t in_chunk, int64_t rows) {
    const int64_t room = TopK::kChunk - in_chunk - rows;
    return LoadTile(cursor, room > 0 ? room : TopK::kChunk);
  }

  __aicore__ inline void ScorePiece(Job& job) {
    AddQuery(job.piece);
    const int64_t first = job.ranking.blocks.scored_begin + job.piece.first;
    // Indices count the rows that are scored, which are the blocks' numbers if none is skipped.
    int64_t first_index = first;
    int32_t in_chunk = 0;
    AscendC::LocalTensor<float> scores = top_k_.BeginChunk();
    int64_t rows = job.rows;
    int64_t next_rows = job.next_rows;
    if (rows == 0) BeginNext();
    while (rows > 0) {
      if (next_rows == kNotAskedFor) next_rows = LoadTileBehind(job.cursor, in_chunk, rows);
      const bool is_last = next_rows == 0;
      if (is_last) BeginNext();
      ScoreTile(rows, scores[static_cast<uint32_t>(in_chunk)]);
      if (is_last && has_next_ && next_.next_rows == kNotAskedFor) {
        next_.next_rows = LoadTileBehind(next_.cursor, 0, next_.rows);
      }
      in_chunk += static_cast<int32_t>(rows);
      if (in_chunk == TopK::kChunk) {
        top_k_.EndChunk(in_chunk, static_cast<int32_t>(first_index));
        first_index += in_chunk;
        in_chunk = 0;
        if (!is_last) scores = top_k_.BeginChunk();
      }
      rows = next_rows;
      next_rows = is_last ? 0 : kNotAskedFor;
    }
    if (in_chunk > 0) top_k_.EndChunk(in_chunk, static_cast<int32_t>(first_index));
    if (job.cursor.skipped) NumberBlocks(first, job.cursor);
  }

  __aicore__ inline int64_t Group() const { return a_.num_heads / a_.num_kv_heads; }
  __aicore__ inline int64_t HeadsAtOnce() const {
    return kHeadsBytes / static_cast<int64_t>(sizeof(T)) / a_.head_dim;
  }

  // Asks for query heads of a piece's KV head, from the group's h-th on.
  __aicore__ inline void LoadHeads(const Piece& piece, int64_t h) {
    const int64_t count = Smaller(Group() - h, HeadsAtOnce());
    const AscendC::LocalTensor<T> heads = heads_.template AllocTensor<T>();
    LoadRows(heads,
             {a_.query,
              piece.b * a_.query_request_stride + (piece.n * Group() + h) * a_.query_head_stride,
              a_.query_head_stride, count, a_.head_dim});
    heads_.EnQue(heads);
  }

  // The first heads are asked for.
  __aicore__ inline void AddQuery(const Piece& piece) {
    for (int64_t h = 0; h < Group(); h += HeadsAtOnce()) {
      if (h > 0) LoadHeads(piece, h);
      AscendC::LocalTensor<T> heads = heads_.template DeQue<T>();
      query_.AddHeads(heads, Smaller(Group() - h, HeadsAtOnce()), h == 0);
      heads_.FreeTensor(heads);
    }
    query_.Finish(Group());
  }

  __aicore__ inline bool FindBlock(Cursor& cursor, int64_t& metadata_block) const {
    while (cursor.j < cursor.end) {
      metadata_block = MetadataBlock(cursor, 0);
      if (metadata_block >= 0 && metadata_block < a_.num_metadata_blocks) return true;
      cursor.skipped = true;
      cursor.j += Smaller(RowsLeft(cursor.j), cursor.end - cursor.j);
    }
    return false;
  }

  // Rows of block j's metadata block from j on.
  __aicore__ inline int64_t RowsLeft(int64_t j) const {
    return a_.rows_per_metadata_block - j % a_.rows_per_metadata_block;
  }

  // Rows from the cursor on that one copy can take: of one metadata block, or, where each has one
  // row, of metadata blocks that lie one behind the other.
  __aicore__ inline int64_t RunLength(const Cursor& cursor, int64_t metadata_block,
                                      int64_t most) const {
    const int64_t limit = Smaller(cursor.end - cursor.j, most);
    if (a_.rows_per_metadata_block > 1) return Smaller(RowsLeft(cursor.j), limit);
    int64_t run = 1;
    while (run < limit && metadata_block + run < a_.num_metadata_blocks &&
           MetadataBlock(cursor, run) == metadata_block + run) {
      ++run;
    }
    return run;
  }

  // The table's entry for the row that is `ahead` of the cursor.
  __aicore__ inline int64_t MetadataBlock(const Cursor& cursor, int64_t ahead) const {
    return ReadInt32(a_.metadata_block_tables.address,
                     cursor.b * a_.metadata_block_tables.stride +
                         (cursor.j + ahead) / a_.rows_per_metadata_block);
  }

  // Asks for the next rows, at most `most`; returns how many.
  __aicore__ inline int64_t LoadTile(Cursor& cursor, int64_t most) {
    int64_t metadata_block = 0;
    if (!FindBlock(cursor, metadata_block)) return 0;
    AscendC::LocalTensor<T> tile = tiles_.template AllocTensor<T>();
    const int64_t limit = Smaller(most, tile_rows_);
    int64_t rows = 0;
    do {
      const int64_t row = cursor.j % a_.rows_per_metadata_block;
      const int64_t run = RunLength(cursor, metadata_block, limit - rows);
      const auto place = static_cast<uint32_t>(rows * a_.head_dim);
      LoadRows(tile[place], RowsAt(a_.maxblocks, metadata_block, row, cursor.n, run));
      LoadRows(tile[static_cast<uint32_t>(kTileElements) + place],
               RowsAt(a_.minblocks, metadata_block, row, cursor.n, run));
      rows += run;
      cursor.j += run;
    } while (rows < limit && FindBlock(cursor, metadata_block));
    tiles_.EnQue(tile);
    return rows;
  }

  __aicore__ inline Rows RowsAt(const PoolArguments& pool, int64_t block, int64_t row, int64_t n,
                                int64_t count) const {
    return {pool.address, block * pool.block_stride + row * pool.row_stride + n * pool.head_stride,
            a_.rows_per_metadata_block > 1 ? pool.row_stride : pool.block_stride, count,
            a_.head_dim};
  }

  __aicore__ inline void ScoreTile(int64_t rows, const AscendC::LocalTensor<float>& scores) {
    AscendC::LocalTensor<T> tile = tiles_.template DeQue<T>();
    query_.Score(tile, tile[static_cast<uint32_t>(kTileElements)], static_cast<uint8_t>(rows),
                 scores, Release{tiles_, tile});
  }

  // Turns the indices of the best, which count scored rows from `first` on, into block numbers.
  __aicore__ inline void NumberBlocks(int64_t first, const Cursor& all) {
    AscendC::PipeBarrier<PIPE_ALL>();
    const AscendC::LocalTensor<uint32_t> pairs = top_k_.best().ReinterpretCast<uint32_t>();
    for (int32_t i = 0; i < top_k_.num_best(); ++i) {
      const auto place = static_cast<uint32_t>(TopK::kFloatsPerPair * i + 1);
      int64_t left = static_cast<int64_t>(pairs.GetValue(place)) - first;
      Cursor cursor = {all.b, all.n, first, all.end, false};
      int64_t metadata_block = 0;
      while (FindBlock(cursor, metadata_block)) {
        const int64_t run = Smaller(RowsLeft(cursor.j), cursor.end - cursor.j);
        if (left < run) break;
        left -= run;
        cursor.j += run;
      }
      pairs.SetValue(place, static_cast<uint32_t>(cursor.j + left));
    }
    AscendC::PipeBarrier<PIPE_ALL>();
  }

  __aicore__ inline void StorePartial(uint64_t address) {
    AscendC::PipeBarrier<PIPE_ALL>();
    const AscendC::LocalTensor<int32_t> header = header_buffer_.Get<int32_t>();
    header.SetValue(0, top_k_.num_best());
    AscendC::PipeBarrier<PIPE_ALL>();
    StoreRows({address, 0, 0, 1, 1}, header);
    if (top_k_.num_best() > 0) {
      StoreRows({address + kPartialHeaderBytes, 0, 0, 1,
                 static_cast<int64_t>(top_k_.num_best()) * TopK::kFloatsPerPair},
                top_k_.best());
    }
    AscendC::PipeBarrier<PIPE_ALL>();
  }

  const QuestBlockSelectPagedArguments& a_;
  const int64_t tile_rows_;
  QueryRow<T> query_;
  TopK top_k_;
  ResultWriter writer_;
  PieceWalk walk_;
  Job next_ = {};
  bool has_next_ = false;
  AscendC::TQue<AscendC::TPosition::VECIN, 1> heads_;
  Tiles tiles_;
  AscendC::TBuf<AscendC::TPosition::VECOUT> header_buffer_;
};

// Second launch, on as many cores: the results of heads that were cut. Each is written by the core
// whose share it begins in.
class QuestBlockSelectMergeKernel {
 public:
  __aicore__ inline QuestBlockSelectMergeKernel(const QuestBlockSelectPagedArguments& arguments,
                                                AscendC::TPipe* pipe)
      : a_(arguments) {
    top_k_.Init(pipe, static_cast<int32_t>(a_.k));
    writer_.Init(pipe);
    pipe->InitBuffer(header_buffer_, kPartialHeaderBytes);
  }

  __aicore__ inline void Run() {
    const auto core = static_cast<int64_t>(AscendC::GetBlockIdx());
    PieceWalk walk(a_);
    walk.Begin(core);
    Piece piece = {};
    while (walk.Next(piece)) {
      if (piece.is_whole() || piece.first != 0) continue;
      top_k_.Clear();
      MergePartial(PartialAddress(a_, core, true));
      const int64_t end = walk.EndOfHead(piece);
      for (int64_t other = core + 1; other < a_.num_cores; ++other) {
        const Share share = walk.ShareOfCore(other);
        if (share.begin >= end) break;
        if (!share.empty()) MergePartial(PartialAddress(a_, other, false));
      }
      writer_.Write(a_, ClampedRanking(a_, piece.b), piece.b, piece.n, top_k_);
    }
  }

 private:
  // Partial lists come in the order of their rows, which ties need.
  __aicore__ inline void MergePartial(uint64_t address) {
    AscendC::PipeBarrier<PIPE_ALL>();
    const AscendC::LocalTensor<int32_t> header = header_buffer_.Get<int32_t>();
    LoadRows(header, {address, 0, 0, 1, 1});
    AscendC::PipeBarrier<PIPE_ALL>();
    const auto count = static_cast<int32_t>(Clamp(header.GetValue(0), 0, a_.k));
    if (count == 0) return;
    LoadRows(top_k_.scratch(), {address + kPartialHeaderBytes, 0, 0, 1,
                                static_cast<int64_t>(count) * TopK::kFloatsPerPair});
    AscendC::PipeBarrier<PIPE_ALL>();
    top_k_.Merge(top_k_.scratch(), count);
  }

  const QuestBlockSelectPagedArguments& a_;
  TopK top_k_;
  ResultWriter writer_;
  AscendC::TBuf<AscendC::TPosition::VECIN> header_buffer_;
};

}  // namespace select_attn::ascend

#endif  // SELECT_ATTN_OPS_ASCEND_QUEST_BLOCK_SELECT_PAGED_H_
