"""The providers that need no server, and what requests refuse."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster_tasks.errors import ConfigurationError, ProviderError
from cluster_tasks.providers import (
    ChatRequest,
    EmbeddingRequest,
    EmbeddingResult,
    ExtractiveChat,
    HashEmbeddings,
    MarginalRelevance,
    RerankRequest,
    chat_provider,
    embedding_provider,
    rerank_provider,
)
from cluster_tasks.settings import ClusterSettings

PASSAGES = (
    "Redis queues. A node whose beat counter stands still for three seconds is fenced. Its jobs are moved\nto others.",
    "The coordinator checks the health of nodes every half second.\n\n- Flower shows the queues",
)


def vectors_of(*texts: str) -> Any:
    return HashEmbeddings().embed(EmbeddingRequest(texts=texts)).vectors


def ask(question: str, *passages: str, **given: Any) -> ChatRequest:
    return ChatRequest(messages=({"role": "user", "content": question},), passages=passages, **given)


def test_misspelt_words_are_near_the_right_ones() -> None:
    asked, close, distant = vectors_of(
        "how do I restart a worker", "how do I restrat a wroker", "how do I bake some bread"
    )
    assert float(asked @ close) > float(asked @ distant) + 0.1


def test_case_spacing_and_punctuation_make_no_difference() -> None:
    plain, other = vectors_of("restart the worker", "  Restart, the\nWORKER! ")
    assert np.array_equal(plain, other)


@given(st.lists(st.text(st.characters(codec="ascii")), min_size=4, max_size=8), st.lists(st.text(), max_size=2))
def test_a_vector_does_not_depend_on_its_neighbours(plain: list[str], others: list[str]) -> None:
    for texts in (plain, plain + others):
        for text, vector in zip(texts, vectors_of(*texts), strict=True):
            assert np.array_equal(vector, vectors_of(text)[0])


def test_unrelated_words_spread_over_all_dimensions() -> None:
    words = [f"{number:x}" for number in np.random.default_rng(7).integers(2**60, size=500)]
    assert (np.abs(vectors_of(*words)).sum(axis=0) > 0).all()


def test_stored_vectors_stay_valid_for_later_releases() -> None:
    # Collections hold these vectors: whoever changes the hashing must give the model another name.
    [vector] = vectors_of("node")
    found = {int(i): round(float(vector[i]), 3) for i in np.flatnonzero(vector)}
    assert found == {10: 0.258, 139: 0.258, 151: 0.258, 197: -0.775, 250: -0.258, 289: -0.258, 328: -0.258}


def test_embeddings_say_what_they_are_and_count_words() -> None:
    result = HashEmbeddings(dimensions=16).embed(EmbeddingRequest(texts=("a b", "c")))
    assert (result.model, result.provider) == ("local-hash", "local-hash")
    assert result.vectors.shape == (2, 16)
    assert result.usage.total_tokens == 3


def test_a_result_goes_through_json_as_lists() -> None:
    result = HashEmbeddings(dimensions=4).embed(EmbeddingRequest(texts=("a",)))
    again = EmbeddingResult.model_validate_json(result.model_dump_json())
    assert isinstance(result.model_dump(mode="json")["vectors"][0], list)
    assert np.array_equal(again.vectors, result.vectors)


def test_vectors_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValidationError):
        EmbeddingResult.model_validate({"vectors": [[1.0, 2.0], [1.0]], "model": "m", "provider": "p"})


def test_an_answer_is_the_sentence_that_fits_the_question() -> None:
    result = ExtractiveChat().chat(ask("When is a node fenced?", *PASSAGES))
    assert result.text == "A node whose beat counter stands still for three seconds is fenced."
    assert (result.model, result.provider, result.finish_reason) == ("local-extractive", "local-extractive", "stop")
    assert result.tool_calls == []


def test_a_line_break_within_a_sentence_does_not_split_it() -> None:
    assert ExtractiveChat().chat(ask("moved jobs", *PASSAGES)).text == "Its jobs are moved to others."


def test_sentences_come_in_the_order_of_the_passages() -> None:
    passages = ("Cats sleep. Lions hunt. Cats purr loudly at night.", "Dogs bark. Cats climb.")
    text = ExtractiveChat().chat(ask("what do cats do", *passages)).text
    assert text == "Cats sleep. Cats purr loudly at night. Cats climb."


def test_a_sentence_that_fits_much_worse_than_the_best_is_left_out() -> None:
    result = ExtractiveChat().chat(ask("cats climb trees", "Cats climb trees. Cats eat. Dogs bark."))
    assert (result.text, result.finish_reason) == ("Cats climb trees.", "stop")


def test_a_sentence_of_two_overlapping_passages_comes_once() -> None:
    assert ExtractiveChat().chat(ask("cats", "Dogs bark. Cats purr.", "Cats purr. Owls hoot.")).text == "Cats purr."


def test_inflections_of_a_word_are_found() -> None:
    passages = ("Queues are drained slowly. Installation takes a minute.",)
    assert ExtractiveChat().chat(ask("how to install it", *passages)).text == "Installation takes a minute."


def test_the_question_is_the_last_user_message_also_in_parts() -> None:
    messages = (
        {"role": "user", "content": "dogs"},
        {"role": "assistant", "content": "Dogs bark."},
        {"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": "and cats"}]},
        {"role": "assistant", "content": None},
    )
    result = ExtractiveChat().chat(ChatRequest(messages=messages, passages=("Dogs bark. Cats purr.",)))
    assert result.text == "Cats purr."


@given(limit=st.integers(1, 40))
def test_an_answer_never_has_more_words_than_asked(limit: int) -> None:
    result = ExtractiveChat().chat(ask("queues nodes jobs health", *PASSAGES, max_tokens=limit))
    assert 1 <= len(result.text.split()) <= limit
    assert result.usage.completion_tokens == len(result.text.split())


def test_an_answer_that_is_cut_says_so() -> None:
    result = ExtractiveChat().chat(ask("When is a node fenced?", *PASSAGES, max_tokens=3))
    assert (result.text, result.finish_reason) == ("A node whose", "length")


def test_an_answer_that_leaves_out_a_good_sentence_says_so() -> None:
    result = ExtractiveChat().chat(ask("cats", "Cats purr. Dogs bark. Cats climb.", max_tokens=3))
    assert (result.text, result.finish_reason) == ("Cats purr.", "length")


def test_without_a_word_in_common_the_answer_is_empty() -> None:
    result = ExtractiveChat().chat(ask("zebra", *PASSAGES))
    assert (result.text, result.finish_reason, result.usage.completion_tokens) == ("", "stop", 0)


def test_usage_counts_the_words_of_messages_and_passages() -> None:
    usage = ExtractiveChat().chat(ask("two words", "Three words here.")).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 3, 8)


@pytest.mark.parametrize(
    "request_",
    [
        ask("hello"),
        ask("hello", "Some text.", tools=[{"type": "function"}]),
        ask("hello", "Some text.", response_format={"type": "json_object"}),
    ],
)
def test_what_only_a_language_model_can_do_names_the_settings(request_: ChatRequest) -> None:
    with pytest.raises(ConfigurationError, match="CLUSTER_LLM_BASE_URL and CLUSTER_LLM_MODEL"):
        ExtractiveChat().chat(request_)


def test_a_prompt_without_a_user_message_is_refused() -> None:
    with pytest.raises(ProviderError, match="no user message"):
        ExtractiveChat().chat(ChatRequest(messages=({"role": "system", "content": "be kind"},), passages=("A.",)))


REPEATED = (
    "Backups run at two in the morning.",
    "Backups run at two in the morning, every day.",
    "Logs are kept for a week.",
    "The weather is fine.",
)


def ranked(scores: tuple[float, ...], texts: tuple[str, ...] = REPEATED, top: int = 9) -> list[tuple[int, Any]]:
    request = RerankRequest(query="backups?", texts=texts, scores=scores, top=top)
    return [(rank.index, rank.score) for rank in MarginalRelevance().rerank(request).ranking]


def test_what_repeats_a_better_text_comes_behind_what_says_something_else() -> None:
    found = ranked((0.9, 0.89, 0.8, 0.1))
    assert [index for index, _ in found] == [0, 2, 1, 3]
    assert found[0][1] == pytest.approx(MarginalRelevance.balance)
    assert ranked((0.9, 0.89, 0.8, 0.1), top=2) == found[:2]


def test_what_has_nothing_in_common_is_ranked_as_the_search_did() -> None:
    texts = ("Zebras.", "Computing!", "Why now?")
    assert [index for index, _ in ranked((30.0, 20.0, -5.0), texts)] == [0, 1, 2]
    assert ranked((7.0,), texts[:1]) == [(0, pytest.approx(MarginalRelevance.balance))]


@given(st.lists(st.tuples(st.text(max_size=9), st.floats(-1e6, 1e6)), min_size=1, max_size=8), st.integers(1, 9))
def test_every_text_has_one_place_and_scores_never_rise(found: list[tuple[str, float]], top: int) -> None:
    texts, scores = zip(*found, strict=True)
    ranking = ranked(scores, texts, top)
    assert len({index for index, _ in ranking}) == len(ranking) == min(top, len(texts))
    assert all(before >= after - 1e-6 for (_, before), (_, after) in pairwise(ranking))


def test_a_request_to_rank_has_a_score_for_each_text() -> None:
    with pytest.raises(ValidationError, match="2 texts have 1 scores"):
        RerankRequest(query="a", texts=("b", "c"), scores=(1.0,), top=1)


def test_another_model_is_not_silently_replaced() -> None:
    with pytest.raises(ConfigurationError, match="CLUSTER_LLM_BASE_URL"):
        ExtractiveChat().chat(ask("cats", "Cats purr.", model="gpt-large"))
    with pytest.raises(ConfigurationError, match="CLUSTER_EMBEDDING_BASE_URL"):
        HashEmbeddings().embed(EmbeddingRequest(texts=("a",), model="big-embedding"))
    with pytest.raises(ConfigurationError, match="CLUSTER_RERANK_BASE_URL"):
        MarginalRelevance().rerank(RerankRequest(query="a", texts=("b",), scores=(1.0,), top=1, model="big-reranker"))


def test_without_settings_the_providers_are_local() -> None:
    assert chat_provider(ClusterSettings()).name == "local-extractive"
    assert embedding_provider(ClusterSettings()).name == "local-hash"
    assert rerank_provider(ClusterSettings()).name == "local-mmr"


@pytest.mark.parametrize(
    ("key", "provider"),
    [("llm_model", chat_provider), ("llm_api_key", chat_provider), ("rerank_model", rerank_provider)],
)
def test_a_model_or_key_without_a_url_is_an_error(key: str, provider: Any) -> None:
    purpose = key.partition("_")[0].upper()
    with pytest.raises(ConfigurationError, match=f"CLUSTER_{key.upper()} is set but CLUSTER_{purpose}_BASE_URL is not"):
        provider(ClusterSettings.model_validate({key: "given"}))


@pytest.mark.parametrize(
    "given",
    [
        {"messages": []},
        {"messages": [{"content": "no role"}]},
        {"temperature": 2.1},
        {"max_tokens": 0},
        {"extra": {"stream": True}},
        {"extra": {"temperature": 1}},
        {"unknown": 1},
    ],
)
def test_a_request_that_cannot_work_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}], **given})


def test_an_embedding_request_needs_a_text() -> None:
    with pytest.raises(ValidationError):
        EmbeddingRequest(texts=())
