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
#include "ascend/piece_walk.h"
#include "ascend/query_row.h"
#include "ascend/result_writer.h"
#include "ascend/top_k.h"
#include "kernel_operator.h"

namespace select_attn::ascend {

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
  };

  // Rows in a buffer, of KV blocks [first, first + rows) of the request. None: there is no tile.
  struct Tile {
    int64_t first;
    int64_t rows;  // or kNotAskedFor

    __aicore__ inline int64_t end() const { return first + rows; }
  };

  // A piece and its first two tiles.
  struct Job {
    Piece piece;
    Ranking ranking;
    Cursor cursor;
    Tile tile;
    Tile next_tile;
  };

  // Makes the core's next piece, if there is one, next_, and asks for its query and first tile.
  __aicore__ inline void BeginNext() {
    has_next_ = walk_.Next(next_.piece);
    if (!has_next_) return;
    const Piece& piece = next_.piece;
    next_.ranking = ClampedRanking(a_, piece.b);
    const int64_t first = next_.ranking.blocks.scored_begin;
    next_.cursor = {piece.b, piece.n, first + piece.first, first + piece.end};
    next_.tile = next_.next_tile = {0, 0};
    if (next_.ranking.num_scored == 0) return;
    LoadHeads(piece, 0);
    next_.tile = LoadTile(next_.cursor, TopK::kChunk);
    if (next_.tile.rows > 0) next_.next_tile.rows = kNotAskedFor;
  }

  // Asks for the tile behind one that has `in_chunk` rows of its chunk before it. What is not
  // scored in between ends the chunk: the rows of one are side by side, so that an index is a block
  // number.
  __aicore__ inline Tile LoadTileBehind(Cursor& cursor, int64_t in_chunk, const Tile& tile) {
    int64_t metadata_block = 0;
    if (!FindBlock(cursor, metadata_block)) return {0, 0};
    const int64_t room = cursor.j == tile.end() ? TopK::kChunk - in_chunk - tile.rows : 0;
    return LoadTile(cursor, room > 0 ? room : TopK::kChunk);
  }

  __aicore__ inline void ScorePiece(Job& job) {
    AddQuery(job.piece);
    int32_t in_chunk = 0;
    AscendC::LocalTensor<float> scores = top_k_.BeginChunk();
    Tile tile = job.tile;
    Tile next = job.next_tile;
    if (tile.rows == 0) BeginNext();
    while (tile.rows > 0) {
      if (next.rows == kNotAskedFor) next = LoadTileBehind(job.cursor, in_chunk, tile);
      const bool is_last = next.rows == 0;
      if (is_last) BeginNext();
      ScoreTile(tile.rows, scores[static_cast<uint32_t>(in_chunk)]);
      if (is_last && has_next_ && next_.next_tile.rows == kNotAskedFor) {
        next_.next_tile = LoadTileBehind(next_.cursor, 0, next_.tile);
      }
      in_chunk += static_cast<int32_t>(tile.rows);
      if (is_last || in_chunk == TopK::kChunk || next.first != tile.end()) {
        top_k_.EndChunk(in_chunk, static_cast<int32_t>(tile.end() - in_chunk));
        in_chunk = 0;
        if (!is_last) scores = top_k_.BeginChunk();
      }
      tile = next;
      next.rows = is_last ? 0 : kNotAskedFor;
    }
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

  // Whether the cursor's row has a place in the pool, and which.
  __aicore__ inline bool HasBlock(const Cursor& cursor, int64_t& metadata_block) const {
    metadata_block = MetadataBlock(cursor, 0);
    return metadata_block >= 0 && metadata_block < a_.num_metadata_blocks;
  }

  // Passes over rows without; false if no other is left.
  __aicore__ inline bool FindBlock(Cursor& cursor, int64_t& metadata_block) const {
    while (cursor.j < cursor.end) {
      if (HasBlock(cursor, metadata_block)) return true;
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

  // Asks for the next rows that are side by side, at most `most`.
  __aicore__ inline Tile LoadTile(Cursor& cursor, int64_t most) {
    int64_t metadata_block = 0;
    if (!FindBlock(cursor, metadata_block)) return {0, 0};
    AscendC::LocalTensor<T> tile = tiles_.template AllocTensor<T>();
    const int64_t first = cursor.j;
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
    } while (rows < limit && cursor.j < cursor.end && HasBlock(cursor, metadata_block));
    tiles_.EnQue(tile);
    return {first, rows};
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
