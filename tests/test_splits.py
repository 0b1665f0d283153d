"""Splits and roles: disjoint, stratified exactly, blocks whole, no information in the class alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mia_utils import datasets
from mia_utils.protocol import splits
from mia_utils.protocol.splits import ROLES, Split, draw

BLOCKS = {"0001TP": 124, "0006R0": 101, "0016E5": 305, "Seq05VD": 171}  # frames a drive of CamVid has


def make_pool(n: int = 1000, n_classes: int = 7, *, seed: int = 0, uneven: bool = True) -> datasets.Pool:
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.3, 1, n_classes) if uneven else np.ones(n_classes)
    labels = rng.choice(n_classes, size=n, p=weights / weights.sum()) if uneven else np.arange(n) % n_classes
    return datasets.Pool(
        name="toy",
        images=rng.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8),
        labels=labels,
        image_ids=np.array([f"{i:05d}.png" for i in range(n)]),
        official_split=np.where(np.arange(n) < 0.8 * n, "train", "test"),
        class_names=tuple(f"c{i}" for i in range(n_classes)),
    )


def make_video(seed: int = 0, drives: dict[str, int] = BLOCKS) -> datasets.Pool:
    names = np.repeat(list(drives), list(drives.values()))
    n = len(names)
    ids = np.array([f"{drive}_{i:05d}.png" for i, drive in enumerate(names)])
    return datasets.Pool(
        name="video",
        images=np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8),
        labels=np.zeros(n, dtype=np.int64),
        image_ids=ids,
        official_split=np.where(names == "Seq05VD", "test", "train"),
        class_names=("any",),
        groups=datasets.make_blocks(ids, names),
    )


def get_roles(split: Split) -> list[np.ndarray]:
    return [getattr(split, role) for role in ROLES]


SIZES = {"n_members": 90, "n_nonmembers": 300, "n_shadow_nonmembers": 180}


# ------------------------------------------------------------------------------------------- draw


def test_roles_and_utility_are_disjoint_and_cover_the_pool_for_many_seeds():
    pool = make_pool()
    for seed in range(20):
        split = draw(pool, **SIZES, seed=seed)
        assert [len(part) for part in get_roles(split)] == [90, 300, 90, 180]
        everything = np.concatenate([*get_roles(split), split.utility])
        assert np.array_equal(np.sort(everything), np.arange(len(pool)))
        assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in get_roles(split))


def test_every_role_has_of_each_label_its_proportion_rounded_down_or_up():
    for seed in range(30):
        pool = make_pool(n_classes=2 + seed % 9, seed=seed)
        counts = np.bincount(pool.labels)
        split = draw(pool, **SIZES, seed=seed)
        for part in get_roles(split):
            ideal = len(part) * counts / len(pool)
            got = np.bincount(pool.labels[part], minlength=len(counts))
            assert (got >= np.floor(ideal)).all() and (got <= np.ceil(ideal)).all()


def test_roles_of_one_size_differ_by_at_most_one_image_in_every_label():
    pool = make_pool()
    for seed in range(20):
        split = draw(pool, n_members=101, n_nonmembers=101, n_shadow_nonmembers=101, seed=seed)
        table = np.stack([np.bincount(pool.labels[part], minlength=7) for part in get_roles(split)])
        assert (table.max(axis=0) - table.min(axis=0)).max() <= 1


def test_dependent_rounding_keeps_margins_and_is_right_on_average():
    sizes, counts = [13, 40, 7, 65], np.array([31, 9, 1, 50, 34])
    ideal = np.outer(sizes, counts) / counts.sum()
    tables = np.stack([splits._round_table(sizes, counts, np.random.default_rng(seed)) for seed in range(600)])
    assert (tables.sum(axis=2) == sizes).all() and (tables.sum(axis=1) == counts).all()
    assert (abs(tables - ideal) < 1).all()
    # standard error of a mean of 600 coins is at most .0204: five of them
    assert abs(tables.mean(axis=0) - ideal).max() < 0.102


def test_every_image_is_equally_often_in_every_role():
    pool = make_pool(80, 3)
    times = np.zeros((4, 80))
    for seed in range(400):
        split = draw(pool, n_members=20, n_nonmembers=20, n_shadow_nonmembers=20, seed=seed)
        for role, part in enumerate(get_roles(split)):
            times[role, part] += 1
    # 320 counts of binomial(400, .25), sd 8.7: the largest deviation of a fair draw stays below 4.5 sd
    assert abs(times - 100).max() < 39 and np.allclose(times.mean(axis=1), 100)


def test_the_same_seed_repeats_and_another_differs_whatever_the_order_of_the_pool():
    pool = make_pool()
    a, b, c = draw(pool, **SIZES, seed=1), draw(pool, **SIZES, seed=1), draw(pool, **SIZES, seed=2)
    assert a.hash == b.hash != c.hash
    order = np.random.default_rng(3).permutation(len(pool))
    moved = pool.take(order)
    d = draw(moved, **SIZES, seed=1)
    for role in ROLES:
        assert set(pool.image_ids[getattr(a, role)]) == set(moved.image_ids[getattr(d, role)])


def test_drawing_leaves_the_global_random_state_alone():
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    draw(make_pool(), **SIZES).roles("partial")
    assert np.array_equal(before, np.random.get_state()[1])


def test_exact_duplicates_are_dropped_all_but_the_first():
    pool = make_pool()
    pool.images[[10, 500, 900]] = pool.images[3]
    pool.images[[4, 40]] = 0
    for seed in range(10):
        split = draw(pool, **SIZES, seed=seed)
        used = np.concatenate([*get_roles(split), split.utility])
        assert np.array_equal(np.sort(used), np.setdiff1d(np.arange(1000), [10, 500, 900, 40]))


def test_fewer_images_than_the_split_needs_is_one_line_with_both_numbers():
    pool = make_pool()
    with pytest.raises(ValueError) as error:
        draw(pool)  # 256 + 3,000 + 256 and at least one
    text = str(error.value)
    assert "3513" in text and "1000" in text and "n_nonmembers 3000" in text and "\n" not in text
    pool.images[1:6] = pool.images[0]
    with pytest.raises(ValueError, match="needs 1000 images.*has 995 after 5 exact duplicates"):
        draw(pool, n_members=100, n_nonmembers=700, n_shadow_nonmembers=100)


def test_shadow_strangers_are_capped_by_what_is_left_and_shadows_may_be_absent():
    pool = make_pool()
    assert len(draw(pool, n_members=100, n_nonmembers=500).shadow_nonmembers) == 200
    assert len(draw(pool, n_members=100, n_nonmembers=650).shadow_nonmembers) == 150
    alone = draw(pool, n_members=100, n_nonmembers=900, n_shadow_members=0)
    assert len(alone.shadow_members) == len(alone.shadow_nonmembers) == 0
    alone.roles("partial")
    with pytest.raises(ValueError, match="shadow members"):
        alone.roles("shadow:PET")


@pytest.mark.parametrize("bad", [{"n_members": 0}, {"n_members": 2.5}, {"n_nonmembers": True}, {"rule": "random"}])
def test_impossible_numbers_and_rules_are_one_line(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        draw(make_pool(), **(SIZES | bad))


def test_the_official_rule_takes_members_from_train_and_strangers_from_test():
    pool = make_pool()
    for seed in range(5):
        split = draw(pool, n_members=100, n_nonmembers=80, n_shadow_nonmembers=80, seed=seed, rule="official")
        for role in ROLES:
            expected = "test" if role.endswith("nonmembers") else "train"
            assert set(pool.official_split[getattr(split, role)]) == {expected}
        assert split.rule == "official" and "official" in repr(split)
    with pytest.raises(ValueError, match="needs 201 images.*has 200 in its official test split"):
        draw(pool, n_members=100, n_nonmembers=200, rule="official")
    bare = datasets.Pool("bare", pool.images, pool.labels, pool.image_ids, None, pool.class_names)
    with pytest.raises(ValueError, match="official_split"):
        draw(bare, **SIZES, rule="official")


# ------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("n", [60, 120, 169])
def test_blocks_are_never_split_and_drives_keep_their_share(n):
    pool = make_video()
    share = np.array(list(BLOCKS.values())) / len(pool)
    for seed in range(8):
        split = draw(pool, n_members=n, n_nonmembers=n, n_shadow_nonmembers=n, seed=seed)
        owners = [set(pool.groups[part]) for part in [*get_roles(split), split.utility]]
        for i, a in enumerate(owners):
            for b in owners[:i]:
                assert not a & b
        for part in get_roles(split):
            assert len(part) == n
            got = np.bincount(split.strata[part], minlength=4)
            assert abs(got - n * share).max() <= 16  # two blocks


def test_a_role_takes_at_most_one_block_more_than_it_needs():
    pool = make_video()
    for seed in range(8):
        split = draw(pool, n_members=100, n_nonmembers=100, n_shadow_nonmembers=100, seed=seed)
        for part in get_roles(split):
            assert np.isin(pool.groups, np.unique(pool.groups[part])).sum() < 100 + 16


def test_blocks_that_do_not_add_up_are_one_line():
    pool = make_video()
    with pytest.raises(ValueError, match="needs 702 images.*has 701"):
        draw(pool, n_members=100, n_nonmembers=300, n_shadow_nonmembers=202)
    with pytest.raises(ValueError, match="whole groups.*ask for fewer") as error:
        draw(pool, n_members=175, n_nonmembers=175, n_shadow_nonmembers=175)
    assert "\n" not in str(error.value)
    # strangers of the shadow are a wish unless a number is given
    assert 175 <= len(draw(pool, n_members=170, n_nonmembers=170).shadow_nonmembers) <= 191


def test_groups_without_drives_are_stratified_by_their_most_frequent_label():
    base = make_pool(400, 3)
    patients = np.array([f"patient {i // 5}" for i in range(400)])
    labels = np.repeat(np.arange(80) % 3, 5)
    pool = datasets.Pool("p", base.images, labels, base.image_ids, None, base.class_names, groups=patients)
    split = draw(pool, n_members=60, n_nonmembers=120, n_shadow_nonmembers=60)
    for part in get_roles(split):
        assert len(np.unique(patients[part])) == len(part) / 5
        assert abs(np.bincount(labels[part]) - len(part) / 3).max() <= 10
    split.roles("partial")


def test_the_official_rule_keeps_blocks_together():
    pool = make_video()
    split = draw(pool, n_members=120, n_nonmembers=60, n_shadow_nonmembers=60, rule="official")
    owners = [set(pool.groups[part]) for part in get_roles(split)]
    assert sum(map(len, owners)) == len(set().union(*owners))


# ------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("make", [make_pool, make_video])
def test_a_saved_split_comes_back_the_same(tmp_path, make):
    pool = make()
    split = draw(pool, n_members=60, n_nonmembers=120, n_shadow_nonmembers=60, seed=4)
    split.save(tmp_path / "deep" / "split.npz")
    again = Split.load(tmp_path / "deep" / "split.npz")
    assert again.hash == split.hash and again.seed == 4 and again.pool_name == pool.name
    assert np.array_equal(again.roles("partial").fold, split.roles("partial").fold)
    again.check_pool(pool)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["split.npz"]


def test_an_edited_a_damaged_and_a_missing_split_are_one_line_each(tmp_path):
    path = tmp_path / "split.npz"
    draw(make_pool(), **SIZES).save(path)
    with np.load(path) as file:
        arrays = dict(file)
    arrays["target_members"][0] += 1
    np.savez(tmp_path / "edited.npz", **arrays)
    with pytest.raises(ValueError, match="edited.npz.*changed"):
        Split.load(tmp_path / "edited.npz")
    (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:500])
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    for name in ("cut", "other"):
        with pytest.raises(ValueError, match=f"{name}.npz: not a saved split"):
            Split.load(tmp_path / f"{name}.npz")
    with pytest.raises(FileNotFoundError, match="no such split"):
        Split.load(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="can not write"):
        draw(make_pool(), **SIZES).save(path / "below-a-file.npz")


def test_a_split_refuses_another_pool():
    with pytest.raises(ValueError, match="expected the pool this split was drawn from"):
        draw(make_pool(), **SIZES).check_pool(make_pool(seed=1))


# ------------------------------------------------------------------------------------------- roles


def test_partial_knowledge_reports_every_target_image_once_in_five_disjoint_folds():
    pool = make_pool()
    for seed in range(10):
        split = draw(pool, **SIZES, seed=seed)
        roles = split.roles("partial")
        assert len(roles) == 390 and set(roles.source) == {"target"} and roles.groups is None
        assert set(roles.index[roles.is_member]) == set(split.target_members)
        assert set(roles.index[~roles.is_member]) == set(split.target_nonmembers)
        reported = np.concatenate([report for _, _, report in roles.folds])
        assert np.array_equal(np.sort(reported), np.arange(390))
        for f, (fit, validation, report) in enumerate(roles.folds):
            assert not set(fit) & set(validation) and not (set(fit) | set(validation)) & set(report)
            assert (roles.fold[report] == f).all()
            assert abs(len(validation) / (len(fit) + len(validation)) - 0.2) < 0.01


def test_folds_are_stratified_by_label_and_membership_exactly():
    for seed in range(15):
        pool = make_pool(n_classes=2 + seed % 8, seed=seed)
        roles = draw(pool, **SIZES, seed=seed).roles("partial")
        labels = pool.labels[roles.index]
        for member in (True, False):
            here = roles.is_member == member
            table = np.zeros((5, len(pool.class_names)), dtype=int)
            np.add.at(table, (roles.fold[here], labels[here]), 1)
            assert (np.ptp(table, axis=0) <= 1).all() and np.ptp(table.sum(axis=1)) <= 1


def test_validation_is_a_fifth_of_every_label_and_membership():
    pool = make_pool()
    for knowledge in ("partial", "shadow:PET"):
        roles = draw(pool, **SIZES).roles(knowledge)
        for fit, validation, _ in roles.folds:
            for label in range(7):
                for member in (True, False):
                    cell = (roles.strata == label) & (roles.is_member == member)
                    n_fit, n_validation = cell[fit].sum(), cell[validation].sum()
                    assert abs(n_validation - (n_fit + n_validation) / 5) < 1


def test_shadow_knowledge_fits_on_the_shadow_and_reports_all_target_images():
    split = draw(make_pool(), **SIZES)
    roles = split.roles("shadow:PET")
    ((fit, validation, report),) = roles.folds
    assert set(roles.index[report]) == set(split.target_members) | set(split.target_nonmembers)
    assert set(roles.index[np.r_[fit, validation]]) == set(split.shadow_members) | set(split.shadow_nonmembers)
    assert (roles.source[report] == "target").all() and (roles.source[fit] == "shadow").all()
    assert set(roles.index[roles.is_member]) == set(split.target_members) | set(split.shadow_members)
    assert (roles.fold[report] == 0).all() and (roles.fold[fit] == -1).all()
    # one set of roles for all shadow knowledge, so its controls are one row too
    other = split.roles("shadow:PE-")
    assert all(np.array_equal(a, b) for a, b in zip(other.folds[0], roles.folds[0], strict=True))


def test_roles_repeat_with_their_seed_and_differ_with_another():
    split = draw(make_pool(), **SIZES, seed=3)
    same, default, other = split.roles("partial", seed=3), split.roles("partial"), split.roles("partial", seed=4)
    assert np.array_equal(same.fold, default.fold) and not np.array_equal(other.fold, default.fold)
    assert all(np.array_equal(same.folds[f][part], default.folds[f][part]) for f in range(5) for part in range(3))


def score_by_stratum(roles: splits.Roles) -> float:
    """AUC of an attacker who reads the stratum only: the share of members among what it knows of that stratum."""
    values = []
    for fit, validation, report in roles.folds:
        known = np.concatenate([fit, validation])
        n = roles.strata.max() + 1
        members = np.bincount(roles.strata[known], weights=roles.is_member[known], minlength=n)
        share = members / np.maximum(np.bincount(roles.strata[known], minlength=n), 1)
        score, member = share[roles.strata[report]], roles.is_member[report]
        above = score[member][:, None] - score[~member][None, :]
        values.append((above > 0).mean() + (above == 0).mean() / 2)
    return float(np.mean(values))


@pytest.mark.parametrize(("n_members", "n_classes"), [(256, 10), (128, 8), (128, 12)])
def test_an_attacker_who_reads_only_the_class_gets_one_half(n_members, n_classes):
    pool = make_pool(3000, n_classes, uneven=False)
    values = []
    for seed in range(5):
        split = draw(pool, n_members=n_members, n_nonmembers=1000, seed=seed)
        values.append(score_by_stratum(split.roles("partial")))
    # .476 to .494 for cross-fitting that only stratifies
    assert abs(np.mean(values) - 0.5) < 0.004


def test_an_attacker_who_reads_only_the_drive_gets_one_half_on_blocks():
    pool = make_video()
    values = [
        score_by_stratum(draw(pool, n_members=n, n_nonmembers=n, n_shadow_nonmembers=n, seed=seed).roles("partial"))
        for n in (120, 169)
        for seed in range(5)
    ]
    # .38 and .43 without the balance
    assert abs(np.mean(values) - 0.5) < 0.01


def test_balancing_leaves_out_few_images():
    pool = make_pool(5000, 10, uneven=False)
    roles = draw(pool, n_members=256, n_nonmembers=3000).roles("partial")
    for fit, validation, report in roles.folds:
        known = np.concatenate([fit, validation])
        assert len(known) > 0.97 * (3256 - len(report))
        assert roles.is_member[known].sum() >= 0.97 * roles.is_member[np.setdiff1d(np.arange(3256), report)].sum()


def test_many_tiny_classes_still_give_attackers_enough_members():
    pool = make_pool(2000, 400, uneven=False)
    roles = draw(pool, n_members=256, n_nonmembers=1000).roles("partial")
    assert min(roles.is_member[fit].sum() for fit, _, _ in roles.folds) > 150


def test_blocks_stay_together_in_fit_validation_and_report_unless_asked_otherwise():
    pool = make_video()
    split = draw(pool, n_members=169, n_nonmembers=169, n_shadow_nonmembers=169)
    for seed in range(8):
        for knowledge in ("partial", "shadow"):
            roles = split.roles(knowledge, seed=seed)
            assert np.array_equal(roles.groups, pool.groups[roles.index])
            for parts in roles.folds:
                owners = [set(roles.groups[part]) for part in parts]
                assert not (owners[0] & owners[1] or owners[0] & owners[2] or owners[1] & owners[2])
    frames = split.roles("partial", by_block=False)
    fit, _, report = frames.folds[0]
    assert len(set(frames.groups[fit]) & set(frames.groups[report])) > 10


def test_the_known_share_thins_what_the_attacker_knows_and_not_what_is_reported():
    split = draw(make_pool(), **SIZES)
    for knowledge in ("partial", "shadow"):
        full = split.roles(knowledge)
        for share in (0.2, 0.5):
            part = split.roles(knowledge, known_share=share)
            for (fit, validation, report), (fit_all, validation_all, report_all) in zip(
                part.folds, full.folds, strict=True
            ):
                assert np.array_equal(report, report_all)
                assert abs(len(fit) + len(validation) - share * (len(fit_all) + len(validation_all))) <= 1
    with pytest.raises(ValueError, match="known_share"):
        split.roles("partial", known_share=0)


def test_unknown_knowledge_and_too_few_images_are_one_line():
    split = draw(make_pool(), **SIZES)
    for bad in ("full", "", None, "Shadow"):
        with pytest.raises(ValueError, match="partial.*shadow"):
            split.roles(bad)
    tiny = draw(make_pool(), n_members=3, n_nonmembers=3, n_shadow_nonmembers=3)
    with pytest.raises(ValueError, match="draw more images") as error:
        tiny.roles("partial")
    assert "\n" not in str(error.value)


def test_a_pool_of_scenes_is_split_end_to_end(tmp_path):
    pool = datasets.load("scenes", tmp_path, n=60, size=16)
    split = draw(pool, n_members=12, n_nonmembers=24, n_shadow_nonmembers=12)
    assert len(split.roles("partial")) == 36 and len(split.roles("shadow:PET")) == 60


# ---------------------------------------------------------------------------------------- reference and joint data


def test_reference_images_play_no_role_and_smaller_draws_are_contained():
    pool = make_pool(300)
    split = splits.draw(pool, n_members=10, n_nonmembers=20, seed=3)
    small, large = split.reference(5), split.reference(15)
    assert np.array_equal(small, large[:5]) and len(set(large)) == 15
    used = np.concatenate([getattr(split, role) for role in splits.ROLES])
    assert not set(large) & set(used)
    with pytest.raises(ValueError, match=r"expected 1 to \d+ reference images"):
        split.reference(len(split.utility) + 1)


def test_joining_keeps_the_target_and_takes_the_other_shadow():
    pool = make_pool(300)
    other = dataclasses.replace(pool, name="other", images=pool.images[:, ::-1].copy())
    mine, theirs = (splits.draw(p, n_members=10, n_nonmembers=20, seed=3) for p in (pool, other))
    joint, split = splits.join(pool, mine, other, theirs)
    split.check_pool(joint)
    assert np.array_equal(joint.images[split.target_members], pool.images[mine.target_members])
    assert np.array_equal(joint.image_ids[split.target_nonmembers], pool.image_ids[mine.target_nonmembers])
    assert np.array_equal(joint.images[split.shadow_members], other.images[theirs.shadow_members])
    assert all(i.startswith("other:") for i in joint.image_ids[split.shadow_nonmembers])
    roles = split.roles("shadow:-ET")
    fit, validation, report = roles.folds[0]
    assert set(roles.source[fit]) == set(roles.source[validation]) == {"shadow"}
    assert set(roles.source[report]) == {"target"} and len(report) == 30


def test_joining_refuses_other_sizes():
    pool = make_pool(300)
    other = dataclasses.replace(pool, name="other", images=pool.images[:, :-1])
    mine, theirs = (splits.draw(p, n_members=10, n_nonmembers=20, seed=3) for p in (pool, other))
    with pytest.raises(ValueError, match="images of one size"):
        splits.join(pool, mine, other, theirs)
